"""`python -m deltatune.cli`."""

from deltatune.cli import main

main()
