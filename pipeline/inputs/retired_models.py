"""Reports retired models before their requests are sent: each once, with the place that names it."""

from __future__ import annotations

from datetime import date

from pipeline import providers
from pipeline.core import jsonl
from pipeline.core.config import Config
from pipeline.core.types import Request
from pipeline.inputs import dialects
from pipeline.inputs.reader import Line


class RetiredModels:
    """Looks at planned lines and describes each retired or retiring model when it first sees it.

    `model` is the user's `--model`. `today` (UTC) decides between "was retired" and "will be retired".
    """

    def __init__(self, settings: Config, *, model: str | None, today: date) -> None:
        self._settings = settings
        self._model = model
        self._today = today
        self._seen: set[tuple[str, str]] = set()

    def notice(self, line: Line, request: Request) -> str | None:
        """Return a warning if the request's model is retired or will be, and none was returned for it before."""
        name = request.provider, request.model
        if name in self._seen:
            return None
        self._seen.add(name)
        retirement = providers.retirement(request.provider, self._settings.providers[request.provider], request.model)
        if retirement is None:
            return None
        what = f"model {request.model!r} of provider {request.provider!r} {retirement.describe(self._today)}"
        place = f"{line.source}:{line.number}"
        setting = self._setting(line, request.provider)
        return f"{setting}: {what} (first used by {place})" if setting else f"{place}: {what}"

    def _setting(self, line: Line, provider: str) -> str | None:
        """Return the option or setting that names the model, None where the line does.

        Reads the line again: a plan does not keep this, and few lines come here.
        """
        draft = dialects.parse(jsonl.loads(line.data))
        if draft.model or not draft.is_portable:
            return None
        if self._model:
            return "option --model"
        if self._settings.request.model:
            return "setting request.model"
        return f"setting providers.{provider}.model"
