"""Installation of emoji sets as artwork of stickers; see install_stickers.py."""
