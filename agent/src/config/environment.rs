//! The environment as the settings read it: typed, with every fault named.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use super::{ConfigError, Named};

/// A value and how the operator named it.
pub(super) struct Setting {
    pub name: Named,
    pub value: String,
}

impl Setting {
    pub fn invalid(&self, why: impl Into<String>) -> ConfigError {
        ConfigError::Invalid {
            setting: self.name.clone(),
            value: self.value.clone(),
            why: why.into(),
        }
    }
}

pub(super) struct Environment<'a> {
    pub variable: &'a dyn Fn(&str) -> Option<OsString>,
    pub names: &'a [OsString],
}

impl Environment<'_> {
    /// An empty variable is one that is not set, as deployments that template them need it.
    pub fn raw(&self, name: &str) -> Option<OsString> {
        (self.variable)(name).filter(|value| !value.is_empty())
    }

    pub fn is_set(&self, name: &str) -> bool {
        self.raw(name).is_some()
    }

    pub fn text(&self, name: &str) -> Result<Option<String>, ConfigError> {
        self.raw(name).map(|raw| self.utf8(name, raw)).transpose()
    }

    /// As written, also when it is empty.
    pub fn stated(&self, name: &str) -> Result<Option<Setting>, ConfigError> {
        let Some(raw) = (self.variable)(name) else { return Ok(None) };
        let value = self.utf8(name, raw)?;
        Ok(Some(Setting { name: Named(name.to_owned()), value }))
    }

    /// All variables that begin with `prefix`, without it, sorted.
    pub fn prefixed(&self, prefix: &str) -> Result<Vec<(String, String)>, ConfigError> {
        let mut found = Vec::new();
        for name in self.names.iter().filter_map(|name| name.to_str()) {
            if let Some(rest) = name.strip_prefix(prefix).filter(|rest| !rest.is_empty())
                && let Some(value) = self.text(name)?
            {
                found.push((rest.to_owned(), value));
            }
        }
        found.sort();
        Ok(found)
    }

    fn utf8(&self, name: &str, raw: OsString) -> Result<String, ConfigError> {
        raw.into_string().map_err(|raw| ConfigError::Invalid {
            setting: Named(name.to_owned()),
            value: raw.to_string_lossy().into_owned(),
            why: "is not UTF-8".to_owned(),
        })
    }

    pub fn setting(&self, name: &str) -> Result<Option<Setting>, ConfigError> {
        let value = self.text(name)?;
        Ok(value.map(|value| Setting { name: Named(name.to_owned()), value }))
    }

    pub fn flag_or(
        &self,
        flag: &str,
        given: Option<String>,
        variable: &str,
    ) -> Result<Option<Setting>, ConfigError> {
        match given {
            Some(value) => {
                let setting = Setting { name: Named(flag.to_owned()), value };
                if setting.value.is_empty() {
                    return Err(setting.invalid("is empty"));
                }
                Ok(Some(setting))
            }
            None => self.setting(variable),
        }
    }

    pub fn path(&self, flag: Option<PathBuf>, variable: &str) -> Option<PathBuf> {
        flag.or_else(|| self.raw(variable).map(PathBuf::from))
    }

    pub fn parse<T>(
        &self,
        name: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(setting) = self.setting(name)? else { return Ok(None) };
        parse(&setting.value).map(Some).map_err(|why| setting.invalid(why))
    }
}

pub(super) fn switch(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| "is neither true nor false".to_owned())
}

/// A bare number counts seconds.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    if let Ok(seconds) = text.parse() {
        return Ok(Duration::from_secs(seconds));
    }
    humantime::parse_duration(text).map_err(|error| format!("is not a duration, as 90s: {error}"))
}

pub(super) fn number<T: TryFrom<u64>>(text: &str, least: u64, most: u64) -> Result<T, String> {
    let number = text.parse().ok().filter(|number| (least..=most).contains(number));
    let number = number.and_then(|number: u64| T::try_from(number).ok());
    number.ok_or_else(|| format!("is not a number between {least} and {most}"))
}
