"""Log lines, as text or as JSON."""

import json
import logging
import sys


class JsonFormatter(logging.Formatter):
    """One JSON object per line; a record's `notes` become fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {"time": self.formatTime(record), "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        fields |= getattr(record, "notes", {})
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def set_up_logging(level: str, form: str = "text") -> None:
    """One line per event on standard error, as `text` or `json`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter("%(asctime)s %(levelname).1s %(name)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("httpx", "botocore", "aiobotocore", "huggingface_hub", "filelock", "asyncio"):
        logging.getLogger(chatty).setLevel("WARNING")
