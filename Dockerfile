# The image of every node of a cluster, and of a single machine:
#
#   docker build -t ftlib .                          # with CUDA; the driver is the host's
#   docker build -t ftlib:cpu --build-arg DEVICE=cpu .
#   docker run --rm --init --gpus all --shm-size 2g -v /data:/data ftlib \
#     ftlib phase2 --data.path /data/pets            # docker stop --time 60 leaves a checkpoint
#
# Everything is installed into the system's Python, because `ray up` runs its commands in login
# shells, whose PATH has no virtual environment. DEVICE must be the same on all nodes.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# gpu or cpu
ARG DEVICE=gpu
# The AWS SDK, which `ray up` needs on the head node. Empty where no cloud is used.
ARG CLOUD_PACKAGES="boto3==1.44.5"

ENV HOME=/home/ray \
    FTLIB_HOME=/data/ftlib \
    LANG=C.UTF-8 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

# rsync and ssh are what `ray up` works with, wget is what KubeRay's probes call, and the compiler
# is for train.compile. User 1000 is the user of AWS's Ubuntu images, who owns /data there.
# hadolint ignore=DL3008
RUN packages="openssh-client rsync wget"; \
    if [[ $DEVICE != cpu ]]; then packages+=" g++"; fi; \
    apt-get update; \
    # shellcheck disable=SC2086
    apt-get install -y --no-install-recommends $packages; \
    rm -rf /var/lib/apt/lists/*; \
    useradd --uid 1000 --create-home --home-dir /home/ray --shell /bin/bash ray; \
    mkdir -p /home/ray/.ray /data; \
    chown ray:ray /home/ray/.ray /data

# The lock has torch's CUDA build. For CPUs torch comes from its own index, and the lock without
# CUDA's packages gives the rest.
WORKDIR /opt/requirements
COPY requirements.txt requirements-dev.txt requirements.lock ./
RUN lock=requirements.lock; \
    if [[ $DEVICE == cpu ]]; then \
      pip install "$(grep -E '^uv==' requirements-dev.txt)"; \
      mapfile -t torch < <(grep -E '^(torch|torchvision)==' requirements.txt); \
      uv pip install --system --no-cache --torch-backend cpu --no-deps "${torch[@]}"; \
      pip uninstall -y uv; \
      lock=requirements-cpu.lock; \
      awk '/^[^ ]/ { cuda = /^(torch|torchvision|triton|cuda-|nvidia-)/ && !/^nvidia-ml-py==/ } \
           !cuda' requirements.lock > "$lock"; \
    fi; \
    pip install --no-deps --require-hashes --only-binary :all: -r "$lock"; \
    if [[ -n $CLOUD_PACKAGES ]]; then \
      read -ra cloud <<< "$CLOUD_PACKAGES"; \
      pip install --constraint requirements.txt "${cloud[@]}"; \
    fi

# Last, because it changes most. Nothing but .dockerignore's short list is sent to the builder.
RUN --mount=type=bind,target=/source,rw \
    pip install --no-deps --no-build-isolation /source; \
    pip check; \
    ftlib --version

USER ray
WORKDIR /home/ray

# Healthy while the raylet answers; a container in which no Ray was started always is.
HEALTHCHECK --interval=30s --timeout=10s --start-period=90s --retries=3 \
  CMD test ! -e /tmp/ray/session_latest \
    || wget -q -T 5 -O- http://127.0.0.1:52365/api/local_raylet_healthz | grep -q success

CMD ["ftlib", "--help"]
