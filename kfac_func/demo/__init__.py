"""The demo: K-FAC, Adam and SGD side by side on two deep autoencoders. Run it with `python -m kfac_func.demo`."""
