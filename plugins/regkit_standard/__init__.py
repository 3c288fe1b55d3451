"""The standard kinds of regkit, one family of mathematics per file. They come through the same door as a stranger's."""
