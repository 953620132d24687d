"""`python -m openeva`, and `torchrun -m openeva train RECIPE` on several devices."""

from openeva.cli import main

main()
