"""What a user runs, one command per file: mlm, glue, image_classification, demo; and their parts."""
