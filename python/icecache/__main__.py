"""python -m icecache"""

from icecache.cli import main

main()
