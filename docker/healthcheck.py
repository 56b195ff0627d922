"""Exit status 0 when this host's Ray node is alive, as its agent says; 1 with the reason otherwise."""

import sys
import urllib.request

URL = "http://127.0.0.1:52365/api/local_raylet_healthz"

try:
    answer = urllib.request.urlopen(URL, timeout=8).read()
except OSError as error:
    sys.exit(f"{URL}: {error}")
sys.exit(0 if b"success" in answer else f"{URL}: {answer!r}")
