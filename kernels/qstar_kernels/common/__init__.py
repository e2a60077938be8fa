"""What the ops share: checks of arguments, launches, words of the kernels, random bits, tables of tiles."""
