"""Where artifacts come from. Each origin answers two questions: what is it made of, and give me this file."""

from ...config import OriginSettings
from .base import Listing, Origin, RemoteFile
from .file import FileOrigin
from .http import HttpOrigin
from .huggingface import HuggingFaceOrigin
from .s3 import S3Origin

__all__ = ["Listing", "Origin", "RemoteFile", "build_origin"]


def build_origin(settings: OriginSettings) -> Origin:
    """The origin that `settings` describe."""
    match settings.type:
        case "file":
            return FileOrigin(settings)
        case "huggingface":
            return HuggingFaceOrigin(settings)
        case "s3":
            return S3Origin(settings)
        case "http":
            return HttpOrigin(settings)
