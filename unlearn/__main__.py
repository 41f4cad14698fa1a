"""`python -m unlearn`: how a job is started."""

from unlearn.cli.app import main

main()
