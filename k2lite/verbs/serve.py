"""Serve a model over HTTP: OpenAI's and Anthropic's APIs, and a page.

Listens on this machine only, unless --host says otherwise; then clients need a key (--api-key-file).
"""

from __future__ import annotations

import argparse
import ipaddress
import sys
from pathlib import Path

from .model_options import add_model_arguments, load_engine

PREFIX_SIZE = "16GiB"


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
    parser.add_argument(
        "--prefix-dir",
        metavar="DIR",
        help="where beginnings of conversations are kept, so that they need not be computed again; 'none' for nowhere "
        "(default: the user's cache folder)",
    )
    parser.add_argument(
        "--prefix-size", metavar="SIZE", help=f"how much of the drive they take (default: {PREFIX_SIZE})"
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
        import llguidance  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise RequestError(f"serving takes the package {error.name}: pip install 'k2lite[serve]'") from error
    from k2lite.byte_sizes import parse_bytes
    from k2lite.quant.user_folders import user_cache_folder
    from k2lite.server.app import Server
    from k2lite.server.listening import listen, run
    from k2lite.server.prefix_store import PrefixStore, demand_folder
    from k2lite.server.service import Limits, Service

    if args.prefix_dir == "none":
        if args.prefix_size is not None:
            raise RequestError("--prefix-size has no effect with --prefix-dir none")
        folder = None
    else:
        folder = Path(args.prefix_dir) if args.prefix_dir else user_cache_folder() / "prefixes"
        demand_folder(folder)
    prefix_size = args.prefix_size or PREFIX_SIZE
    prefix_bytes = parse_bytes(prefix_size)
    limits = Limits(slots=args.slots, queue=args.queue)
    with listen(args.host, args.port) as socket:  # a port that is taken is said before anything loads
        engine = load_engine(args, sequences=limits.slots + limits.kept_prefixes)
        name = args.served_model_name or (args.model.resolve().name if args.model else "k2lite-demo")
        store = None
        if folder is not None:
            store = PrefixStore(folder, engine, limit_bytes=prefix_bytes)
            print(f"k2lite: prefixes are kept in {folder}, up to {prefix_size}", file=sys.stderr)
        service = Service(engine, name=name, limits=limits, store=store)
        port = socket.getsockname()[1]
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"k2lite: {name} answers at http://{host}:{port}/v1 (Ctrl-C ends)", file=sys.stderr, flush=True)
        run(Server(service, key=key).app(), socket)
    return 0


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
