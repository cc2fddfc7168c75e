//! What a sequence is: its tokens, and all that makes a model compute something else of the same tokens.

use quayline_kv_cache::*;

/// What a sequence is besides its tokens, as it was opened.
#[derive(Clone, Debug, Default)]
pub(crate) struct Key {
    /// Name and path.
    pub(crate) adapter: Option<(&'static str, &'static str)>,
    pub(crate) salt: Option<&'static str>,
    pub(crate) media: Vec<Media>,
    pub(crate) embeds: Option<Vec<EmbedsDigest>>,
}

impl Key {
    pub(crate) fn of(&self, tenant: TenantId) -> SequenceKey<'_> {
        SequenceKey {
            adapter: self.adapter.map(|(name, path)| Adapter { name, path }),
            salt: self.salt,
            media: &self.media,
            embeds: self.embeds.as_deref(),
            tenant,
        }
    }

    /// Everything that the first `end` tokens, and the `ahead` ones behind them, were computed from.
    pub(crate) fn text(&self, tokens: &[TokenId], end: u32, ahead: u32, unit: u32) -> Option<Text> {
        let covered = end + ahead;
        let tokens = tokens.get(..covered as usize)?.to_vec();
        let places = self.media.iter().flat_map(|item| {
            let first = item.first.0;
            (first..first + item.tokens.0).map(move |token| (token, item.id.clone(), token - first))
        });
        let items = places.filter(|(token, ..)| *token < covered).collect();
        let units = 0..(end / unit) as usize;
        let embeds = self.embeds.as_ref().map(|all| units.map(|unit| all.get(unit).copied()).collect());
        Some(Text { adapter: self.adapter, salt: self.salt, tokens, items, embeds })
    }
}

/// A prefix in full. Two are equal if a model cannot tell them apart.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Text {
    adapter: Option<(&'static str, &'static str)>,
    salt: Option<&'static str>,
    pub(crate) tokens: Vec<TokenId>,
    /// The tokens that stand for an item, with its name and the place in it.
    pub(crate) items: Vec<(u32, String, u32)>,
    embeds: Option<Vec<Option<EmbedsDigest>>>,
}
