"""The command behind scripts/licences."""

from licensing import LISTING, listing

if __name__ == "__main__":
    LISTING.write_text(listing())
