"""`python -m harness`; worker processes import this module too, and then nothing more."""

if __name__ == "__main__":
    import sys

    from harness.command import main

    sys.exit(main())
