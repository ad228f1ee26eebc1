"""Log lines, as text or as JSON."""

import json
import logging
import sys


class JsonFormatter(logging.Formatter):
    """One JSON object per line; a record's `notes` become fields, and so does `who` where one program has several processes."""

    def __init__(self, who: str = "") -> None:
        super().__init__()
        self._who = {"process": who} if who else {}

    def format(self, record: logging.LogRecord) -> str:
        fields = {"time": self.formatTime(record), "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        fields |= self._who
        fields |= getattr(record, "notes", {})
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def set_up_logging(level: str, form: str = "text", who: str = "") -> None:
    """One line per event on standard error, as `text` or `json`; `who` says which process of several it is."""
    handler = logging.StreamHandler(sys.stderr)
    text = f"%(asctime)s %(levelname).1s {f'[{who}] ' if who else ''}%(name)s %(message)s"
    handler.setFormatter(JsonFormatter(who) if form == "json" else logging.Formatter(text))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("httpx", "botocore", "aiobotocore", "huggingface_hub", "filelock", "asyncio"):
        logging.getLogger(chatty).setLevel("WARNING")
