"""Serve a model over HTTP: OpenAI's and Anthropic's APIs, and a page.

Listens on this machine only, unless --host says otherwise; then clients need a key (--api-key-file).
"""

from __future__ import annotations

import argparse
import ipaddress
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .model_options import add_model_arguments, load_engine

if TYPE_CHECKING:
    from k2lite.engine import Engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="which port, 0 for a free one (default: %(default)s)")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="the key clients must show, one line")
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="what clients call the model (default: the folder's)"
    )
    parser.add_argument("--slots", type=int, default=4, metavar="N", help="answers at a time (default: %(default)s)")
    parser.add_argument(
        "--queue", type=int, default=32, metavar="N", help="requests that may wait (default: %(default)s)"
    )


def execute(args: argparse.Namespace) -> int:
    from k2lite.errors import RequestError

    if not 0 <= args.port < 1 << 16:
        raise RequestError(f"--port is {args.port}; expected 0 to 65535")
    if args.slots < 1 or args.queue < 0:
        raise RequestError("--slots must be 1 or more and --queue 0 or more")
    key = read_key(args.api_key_file)
    if key is None and not _is_loopback(args.host):
        raise RequestError(f"--host {args.host} is open to others, so clients need a key: --api-key-file FILE")
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise RequestError(f"serving takes the package {error.name}: pip install 'k2lite[serve]'") from error
    engine = load_engine(args)
    name = args.served_model_name or (args.model.resolve().name if args.model else "k2lite-demo")
    return serve(engine, name, args, key)


def serve(engine: Engine, name: str, args: argparse.Namespace, key: str | None) -> int:
    """Answer until a signal comes."""
    from k2lite.server.app import Server
    from k2lite.server.listening import listen, run
    from k2lite.server.service import Limits, Service

    limits = Limits(slots=args.slots, queue=args.queue)
    plan_caches(engine, limits.slots + limits.kept_prefixes)
    service = Service(engine, name=name, limits=limits)
    socket = listen(args.host, args.port)
    port = socket.getsockname()[1]
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"k2lite: {name} answers at http://{host}:{port}/v1 (Ctrl-C ends)", file=sys.stderr, flush=True)
    run(Server(service, key=key).app(), socket)
    return 0


def plan_caches(engine: Engine, sequences: int) -> None:
    """Say what the KV caches of so many full sequences take. Raises MemoryPlanError where it is not there."""
    from k2lite.backends.host_memory import host_memory
    from k2lite.errors import MemoryPlanError
    from k2lite.placement import gib

    plan = engine.placement
    needed, available = sequences * plan.kv_bytes, host_memory().available_bytes
    what = f"KV for {sequences} sequences of {plan.context_tokens} tokens {gib(needed)}"
    if needed > available:
        raise MemoryPlanError(f"{what}; {gib(available)} is available: fewer --slots or a smaller --context need less")
    print(f"k2lite: {what}", file=sys.stderr)


def read_key(path: Path | None) -> str | None:
    """The key in a file's first line. Raises RequestError."""
    from k2lite.errors import RequestError

    if path is None:
        return None
    try:
        key = (path.read_text(encoding="utf-8").splitlines() or [""])[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: can't be read: {error}") from error
    if not key:
        raise RequestError(f"{path}: the first line must hold the key")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
