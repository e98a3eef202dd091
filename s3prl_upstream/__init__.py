"""Models of this project as an upstream of s3prl, see README.md."""


def register() -> None:
    """Add ``dphubert_local`` to the upstreams of the installed s3prl, in this process only."""
    from s3prl import hub

    from .hubconf import dphubert_local

    hub.dphubert_local = dphubert_local
