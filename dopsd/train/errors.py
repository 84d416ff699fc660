"""What a training on machines that fail raises; alone in its file, so that a flow can know it without loading torch."""


class LaunchError(RuntimeError):
    """The machines failed, not the job: it may be started again and goes on from its last checkpoint."""
