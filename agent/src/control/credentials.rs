//! What every request to the control plane carries: the token, the cluster, and further headers.

use http::header::{AUTHORIZATION, HeaderName, HeaderValue};

use super::{ControlError, of_file};
use crate::config::{ControlPlane, Token};

/// The metadata key of the agent's cluster.
const CLUSTER_ID: &str = "clusterid";

pub(super) struct Credentials {
    token: Option<Token>,
    fixed: Result<Vec<(HeaderName, HeaderValue)>, ControlError>,
}

impl Credentials {
    pub fn new(settings: &ControlPlane) -> Self {
        let pairs = settings.headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let pairs = pairs.chain([(CLUSTER_ID, &*settings.cluster_id)]);
        let fixed = pairs.map(|(name, value)| {
            let invalid = |why: String| ControlError::Metadata { name: name.to_owned(), why };
            let key = HeaderName::try_from(name).map_err(|error| invalid(error.to_string()))?;
            let value = HeaderValue::from_str(value).map_err(|error| invalid(error.to_string()))?;
            Ok((key, value))
        });
        Self { token: settings.token.clone(), fixed: fixed.collect() }
    }

    /// Reads the token anew. The errors never contain it.
    pub async fn metadata(&self) -> Result<Vec<(HeaderName, HeaderValue)>, ControlError> {
        let mut metadata = self.fixed.clone()?;
        let bearer = match &self.token {
            None => return Ok(metadata),
            Some(Token::Literal(token)) => bearer(token),
            Some(Token::File(path)) => match tokio::fs::read_to_string(path).await {
                Ok(token) => bearer(&token),
                Err(error) => Err(error.to_string()),
            },
        };
        let bearer = bearer.map_err(|why| ControlError::Token { from: self.origin(), why })?;
        metadata.push((AUTHORIZATION, bearer));
        Ok(metadata)
    }

    fn origin(&self) -> String {
        match &self.token {
            Some(Token::File(path)) => of_file(path),
            Some(Token::Literal(_)) | None => "given literally".to_owned(),
        }
    }
}

fn bearer(token: &str) -> Result<HeaderValue, String> {
    // A file that was written by hand ends with a newline; one is forgiven.
    let token = token.strip_suffix('\n').unwrap_or(token);
    let token = token.strip_suffix('\r').unwrap_or(token);
    if token.is_empty() {
        return Err("it is empty".to_owned());
    }
    if token.contains(char::is_whitespace) {
        return Err("it has white space inside".to_owned());
    }
    let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
        .map_err(|_| "it has characters that no header may have".to_owned())?;
    value.set_sensitive(true);
    Ok(value)
}
