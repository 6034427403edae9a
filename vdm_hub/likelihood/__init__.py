"""Floor 2, the quantities: the variational bound and what is reported of it."""
