"""`python -m xlstm_lm`, for launchers that start modules."""

from xlstm_lm.base.import_path import keep_current_folder_out

if __name__ == "__main__":
    keep_current_folder_out()  # before any further import

    from xlstm_lm.cli import main

    main()
