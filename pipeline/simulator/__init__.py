"""A local provider that speaks both protocols as the real ones do; an independent judge of the client.

It shares no code with the rest of the program, so that a misreading of a protocol there cannot hide here.

    with serving(Options(seed=1, rpm=600, faults={"529": 0.05})) as server:
        …  # point a client at server.url
        server.statistics()

`GET /simulator/statistics` tells what was received and what would be billed.

Marks in the user's text demand something of one request: `[[refuse]]`, `[[long]]`, `[[status:NNN]]`; and in a batch
`[[expire]]` (never answered), `[[stuck]]` (not before the window is over), `[[missing]]` (answered, but without a
result) and `[[twice]]` (with two).
"""

from pipeline.simulator.answers import answer_token
from pipeline.simulator.app import build_app
from pipeline.simulator.options import Options, parse_fault
from pipeline.simulator.server import Server, serve_forever, serving

__all__ = ["Options", "Server", "answer_token", "build_app", "parse_fault", "serve_forever", "serving"]
