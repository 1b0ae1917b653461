"""Search: sweeps over spaces of settings, confirmation of winners over seeds, comparison of runs."""
