"""What others wrote, read with care: where files come from, and what they may say."""
