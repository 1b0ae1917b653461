"""The number of CPUs; control groups are joblib's, and tested there."""

import os
import subprocess
import sys

from ftlib.cpus import available_cpus


def test_cpus_that_the_affinity_keeps_from_a_process_do_not_count():
    cpu = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{cpu}}}); from ftlib import cpus; "
    code += "print(cpus.available_cpus())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "1\n"
    assert available_cpus() >= 1
