"""`python -m genailab_helpers.commands`, as `accelerate launch -m` needs it."""

from genailab_helpers.commands import main

main()
