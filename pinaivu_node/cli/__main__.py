"""`python -m pinaivu_node.cli`."""

from pinaivu_node.cli import main

if __name__ == "__main__":
    main()
