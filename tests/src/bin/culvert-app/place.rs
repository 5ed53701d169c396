//! Where this process runs, as its answers tell it.

use serde::{Deserialize, Serialize};

/// The pod, from the environment that its manifest gives it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Place {
    pub pod: String,
    pub node: String,
    pub version: String,
}

impl Place {
    pub fn here() -> Self {
        let of = |name: &str| std::env::var(name).unwrap_or_default();
        Self { pod: of("POD_NAME"), node: of("NODE_NAME"), version: of("APP_VERSION") }
    }
}

/// What a server says about itself and about who asked.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Greeting {
    #[serde(flatten)]
    pub place: Place,
    /// The other end of the connection, as the server sees it.
    pub remote: String,
    /// Its own end.
    pub local: String,
}
