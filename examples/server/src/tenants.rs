//! Tenants that the operator knows: their weights, and the keys that are theirs.

use std::collections::BTreeMap;

use quayline_engine::{Fair, TenantId};
use serde::Deserialize;
use sha2::{Digest, Sha256};

/// Tenants by name.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(transparent)]
pub(crate) struct Tenants(BTreeMap<String, Tenant>);

/// One tenant.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tenant {
    /// Its share, in proportion to the others'.
    #[serde(default = "one")]
    weight: f64,
    /// Whoever carries one of these is this tenant.
    #[serde(default)]
    api_keys: Vec<String>,
}

impl std::fmt::Debug for Tenant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let keys = self.api_keys.len();
        f.debug_struct("Tenant").field("weight", &self.weight).field("api_keys", &keys).finish()
    }
}

fn one() -> f64 {
    1.0
}

/// The engine's name of a tenant. Two names share one with a chance of 2^-64.
pub(crate) fn id(name: &str) -> TenantId {
    let digest = Sha256::digest(name.as_bytes());
    TenantId(digest.iter().take(8).fold(0, |id, &byte| id << 8 | u64::from(byte)))
}

/// Reads a JSON object, or the file that holds it.
///
/// # Errors
/// What is wrong with it, and whose weight or key.
pub(crate) fn read(text: &str) -> Result<Tenants, String> {
    let is_json = text.trim_start().starts_with('{');
    let json = match is_json {
        true => text.to_owned(),
        false => {
            std::fs::read_to_string(text).map_err(|error| format!("{text:?} cannot be read: {error}"))?
        }
    };
    let tenants: Tenants =
        serde_json::from_str(&json).map_err(|error| format!("not the JSON expected here: {error}"))?;
    tenants.check()?;
    Ok(tenants)
}

impl Tenants {
    fn check(&self) -> Result<(), String> {
        let mut holders: BTreeMap<&str, &str> = BTreeMap::new();
        let mut fair = Fair::new();
        for (name, tenant) in &self.0 {
            if name.is_empty() {
                return Err("a tenant has a name".to_owned());
            }
            fair.set_weight(id(name), tenant.weight).map_err(|error| format!("{name}.weight: {error}"))?;
            for key in &tenant.api_keys {
                if key.is_empty() {
                    return Err(format!("{name}.api_keys: a key is empty"));
                }
                if let Some(other) = holders.insert(key, name) {
                    return Err(format!("{name}.api_keys: {other} has one of these keys already"));
                }
            }
        }
        Ok(())
    }

    /// The fair order with these weights.
    pub(crate) fn order(&self) -> Fair {
        let mut fair = Fair::new();
        for (name, tenant) in &self.0 {
            fair.set_weight(id(name), tenant.weight).expect("weights were checked when they were read");
        }
        fair
    }

    /// Every key, with the tenant whose it is.
    pub(crate) fn keys(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0
            .iter()
            .flat_map(|(name, tenant)| tenant.api_keys.iter().map(move |key| (key.as_str(), name.as_str())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn senseless_weights_and_keys_are_refused_by_name() {
        let cases = [
            (r#"{"acme": {"weight": 0}}"#, "acme.weight"),
            (r#"{"acme": {"weight": -1}}"#, "acme.weight"),
            (r#"{"acme": {"weight": 1e300}}"#, "acme.weight"),
            (r#"{"acme": {"weight": NaN}}"#, "JSON"),
            (r#"{"acme": {"wait": 1}}"#, "wait"),
            (r#"{"": {}}"#, "name"),
            (r#"{"a": {"api_keys": ["k"]}, "b": {"api_keys": ["k"]}}"#, "b.api_keys: a has"),
            (r#"{"a": {"api_keys": [""]}}"#, "a.api_keys"),
            ("/there/is/no/such/file", "cannot be read"),
        ];
        for (text, named) in cases {
            let refusal = read(text).unwrap_err();
            assert!(refusal.contains(named), "{text}: {refusal}");
        }
    }

    #[test]
    fn what_is_not_said_is_one_share_and_no_key() {
        let tenants = read(r#" {"acme": {"weight": 0.5, "api_keys": ["k", "l"]}, "other": {}}"#).unwrap();
        assert_eq!(tenants.keys().collect::<Vec<_>>(), [("k", "acme"), ("l", "acme")]);
        assert_eq!(tenants.0["other"].weight, 1.0);
        assert_ne!(id("acme"), id("other"));
    }
}
