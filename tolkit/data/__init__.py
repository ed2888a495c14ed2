"""Text to token ids: documents, tokenizers, and token streams cached on disk."""

from tolkit.data.documents import Document, Source, expand_sources, read_documents
from tolkit.data.tokenizer import Tokenizer
from tolkit.data.tokens import TokenStream, count_tokens, tokens_of

__all__ = [
    "Document",
    "Source",
    "TokenStream",
    "Tokenizer",
    "count_tokens",
    "expand_sources",
    "read_documents",
    "tokens_of",
]
