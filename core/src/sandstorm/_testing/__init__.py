"""The implementation of `sandstorm.testing`."""
