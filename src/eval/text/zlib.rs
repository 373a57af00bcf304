//! The zlib entropy of membership tests (Carlini et al., arXiv 2012.07805): how many bytes a text compresses to.

use std::io::Write;

use flate2::Compression;
use flate2::write::ZlibEncoder;

/// `len(zlib.compress(text.encode()))` of Python: zlib's own deflate at level 6, header and checksum included. Unit: bytes.
pub fn zlib_bytes(text: &str) -> usize {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::new(6));
    let written = encoder.write_all(text.as_bytes()).and_then(|()| encoder.finish());
    written.expect("invariant: a vector takes every byte").len()
}
