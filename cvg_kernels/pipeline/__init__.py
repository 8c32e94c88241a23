"""Where the package meets a diffusers pipeline: its schedule, its calls of the denoiser, its scheduler."""
