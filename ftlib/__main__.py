"""`python -m ftlib JOB` is `ftlib JOB`."""

from ftlib.command import main

main()
