"""What torch calls at the end of its import, in environments whose torchvision was built for another torch."""


def declare() -> None:
    """Declare torchvision's operators, where the package is there and has the function for it."""
    try:
        from xattn_video.integrations.torchvision_ops import declare_at_import
    except ImportError:
        return
    declare_at_import()
