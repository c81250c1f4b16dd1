"""`python -m embrm` is `embrm`."""

from embrm.cli import main

main()
