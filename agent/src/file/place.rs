//! Finds the line of a field, for errors that are only known once the whole file was read.
//!
//! The YAML library tells places in errors alone. So a second pass walks down to the field and
//! fails there on purpose.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::error::Place;

/// One step down into the document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Key(&'static str),
    Index(usize),
}

/// The way from the top of the document to one field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FieldPath(pub(super) Vec<Step>);

impl fmt::Display for FieldPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (depth, step) in self.0.iter().enumerate() {
            match step {
                Step::Key(key) if depth == 0 => f.write_str(key)?,
                Step::Key(key) => write!(f, ".{key}")?,
                Step::Index(index) => write!(f, "[{index}]")?,
            }
        }
        Ok(())
    }
}

/// Where the field stands; for an absent one, where the nearest thing around it begins.
pub(super) fn find(yaml: &[u8], path: &FieldPath) -> Option<Place> {
    let reached = Walk(&path.0).deserialize(serde_yaml_ng::Deserializer::from_slice(yaml));
    reached.err().and_then(|here| place_of(&here))
}

pub(super) fn place_of(error: &serde_yaml_ng::Error) -> Option<Place> {
    error.location().map(|location| Place { line: location.line(), column: location.column() })
}

struct Walk<'a>(&'a [Step]);

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

/// Scalars fail by the visitor's default, which is what reaching them is for.
impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the field that is looked for")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        if let [Step::Key(wanted), below @ ..] = self.0 {
            while let Some(key) = map.next_key::<String>()? {
                if key == *wanted {
                    map.next_value_seed(Walk(below))?;
                } else {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Err(A::Error::custom("here"))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        if let [Step::Index(wanted), below @ ..] = self.0 {
            for _ in 0..*wanted {
                if list.next_element::<IgnoredAny>()?.is_none() {
                    break;
                }
            }
            list.next_element_seed(Walk(below))?;
        }
        Err(A::Error::custom("here"))
    }
}
