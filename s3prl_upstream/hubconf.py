"""The names under which s3prl and ``torch.hub`` find this upstream."""

try:
    from .expert import UpstreamExpert as _UpstreamExpert
except ImportError:  # torch.hub imports this file alone, outside of a package
    from expert import UpstreamExpert as _UpstreamExpert


def dphubert_local(ckpt: str, **options) -> _UpstreamExpert:
    """The model of a local file, compressed or a teacher.

    Args:
        ckpt: path of the ``.pth``.
        options: see ``UpstreamExpert``.
    """
    return _UpstreamExpert(ckpt, **options)
