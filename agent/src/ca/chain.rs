//! Reads the certificate list that Istio's certificate service answers with.

use x509_parser::pem::Pem;

/// `IstioCertificateResponse.cert_chain`, taken apart; everything is DER.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IssuedChain {
    /// The leaf, then the intermediates: what is shown to peers.
    pub presented: Vec<Vec<u8>>,
    /// What peers are verified against. Whether each can be a trust anchor is not judged here.
    pub roots: Vec<Vec<u8>>,
}

/// A certificate list that is not one of Istio's form.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    #[error("certificate list is empty")]
    Empty,
    #[error("no root certificate present")]
    NoRoot,
    #[error("element {position} contains no pem block")]
    NoBlock { position: usize },
    #[error("element {position} contains a pem block {label:?}, expected a certificate")]
    NotACertificate { position: usize, label: String },
    #[error("element {position} is not pem: {reason}")]
    Unreadable { position: usize, reason: String },
}

/// Takes a `cert_chain` apart: first the leaf, last the root bundle, between them intermediates.
///
/// The root bundle is the only element of which more than the first PEM block counts.
pub fn parse_chain<S: AsRef<[u8]>>(elements: &[S]) -> Result<IssuedChain, ChainError> {
    let (roots, presented) = elements.split_last().ok_or(ChainError::Empty)?;
    if presented.is_empty() {
        return Err(ChainError::NoRoot);
    }
    let presented = presented
        .iter()
        .enumerate()
        .map(|(position, element)| first_certificate(position, element.as_ref()))
        .collect::<Result<_, _>>()?;
    Ok(IssuedChain { presented, roots: certificates(elements.len() - 1, roots.as_ref())? })
}

fn first_certificate(position: usize, pem: &[u8]) -> Result<Vec<u8>, ChainError> {
    Pem::iter_from_buffer(pem)
        .next()
        .ok_or(ChainError::NoBlock { position })
        .and_then(|block| certificate(position, block))
}

fn certificates(position: usize, pem: &[u8]) -> Result<Vec<Vec<u8>>, ChainError> {
    let blocks = Pem::iter_from_buffer(pem);
    let found: Vec<_> =
        blocks.map(|block| certificate(position, block)).collect::<Result<_, _>>()?;
    match found.is_empty() {
        true => Err(ChainError::NoBlock { position }),
        false => Ok(found),
    }
}

fn certificate(
    position: usize,
    block: Result<Pem, x509_parser::error::PEMError>,
) -> Result<Vec<u8>, ChainError> {
    let block =
        block.map_err(|error| ChainError::Unreadable { position, reason: error.to_string() })?;
    match block.label.as_str() {
        "CERTIFICATE" => Ok(block.contents),
        _ => Err(ChainError::NotACertificate { position, label: block.label }),
    }
}

#[cfg(test)]
mod tests;
