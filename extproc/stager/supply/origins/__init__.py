"""Where artifacts come from. Each origin answers two questions: what is it made of, and give me this file."""

from ....config.origins import OriginSettings
from .base import Origin

__all__ = ["Origin", "build_origin"]


def build_origin(settings: OriginSettings) -> Origin:
    """The origin that `settings` describe. Its client is imported here: half a second that a stager without it need not spend."""
    match settings.type:
        case "file":
            from .file import FileOrigin

            return FileOrigin(settings)
        case "huggingface":
            from .huggingface import HuggingFaceOrigin

            return HuggingFaceOrigin(settings)
        case "s3":
            from .s3 import S3Origin

            return S3Origin(settings)
        case "http":
            from .http import HttpOrigin

            return HttpOrigin(settings)
