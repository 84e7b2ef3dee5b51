"""Our kernels inside other people's models. Nothing happens on import; an adapter a file, imported by the first swap that needs it."""
