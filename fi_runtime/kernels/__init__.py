"""GPU kernels, each beside its plain-torch meaning. Which one runs, the tensor's device decides."""
