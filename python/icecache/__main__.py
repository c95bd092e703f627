"""python -m icecache"""

from icecache.cli import app

app(prog_name="icecache")
