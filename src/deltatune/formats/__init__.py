"""HOW it is written down elsewhere: other projects' files and habits, as functions from dict to dict."""
