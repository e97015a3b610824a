"""What a user runs: mlm, glue, image_classification, demo; and the parts of these commands."""
