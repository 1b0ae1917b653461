"""How many CPUs there are to use."""


def available_cpus() -> int:
    """CPUs that this process may use: the machine's, less what its affinity (taskset, Slurm) and
    its control group's quota (a container's limit, rounded up) keep from it."""
    import joblib  # sklearn's, which knows both versions of control groups

    return int(joblib.cpu_count())
