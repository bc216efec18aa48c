"""`python -m xlstm_lm`, for launchers that start modules."""

from xlstm_lm.cli import main

if __name__ == "__main__":
    main()
