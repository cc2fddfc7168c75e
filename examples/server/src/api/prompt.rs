//! The four shapes of a completion's prompt: text, texts, tokens, lists of tokens.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};
use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, OneOfBuilder, Schema, Type};
use utoipa::openapi::{RefOr, schema::SchemaType};
use utoipa::{PartialSchema, ToSchema};

/// One prompt or several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Prompt {
    Texts(Vec<String>),
    Tokens(Vec<Vec<u32>>),
}

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        json.deserialize_any(Shapes)
    }
}

struct Shapes;

impl<'de> Visitor<'de> for Shapes {
    type Value = Prompt;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, an array of strings, an array of token ids or an array of arrays of token ids")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Prompt, E> {
        Ok(Prompt::Texts(vec![text.to_owned()]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Prompt, A::Error> {
        match items.next_element()? {
            None => Err(A::Error::custom("the array is empty")),
            Some(Item::Text(text)) => all(text, items).map(Prompt::Texts),
            Some(Item::Token(token)) => Ok(Prompt::Tokens(vec![all(token, items)?])),
            Some(Item::Tokens(tokens)) => all(tokens, items).map(Prompt::Tokens),
        }
    }
}

/// The first element decides what the others must be.
fn all<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(first: T, mut items: A) -> Result<Vec<T>, A::Error> {
    let mut list = vec![first];
    while let Some(item) = items.next_element()? {
        list.push(item);
    }
    Ok(list)
}

enum Item {
    Text(String),
    Token(u32),
    Tokens(Vec<u32>),
}

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        json.deserialize_any(Items)
    }
}

struct Items;

impl<'de> Visitor<'de> for Items {
    type Value = Item;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, a token id or an array of token ids")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Item, E> {
        Ok(Item::Text(text.to_owned()))
    }

    fn visit_u64<E: Error>(self, token: u64) -> Result<Item, E> {
        u32::try_from(token).map(Item::Token).map_err(|_| E::custom(format!("{token} is no token id")))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Item, A::Error> {
        match items.next_element()? {
            None => Ok(Item::Tokens(Vec::new())),
            Some(first) => all(first, items).map(Item::Tokens),
        }
    }
}

impl PartialSchema for Prompt {
    fn schema() -> RefOr<Schema> {
        let text = || ObjectBuilder::new().schema_type(SchemaType::Type(Type::String)).build();
        let token =
            || ObjectBuilder::new().schema_type(SchemaType::Type(Type::Integer)).minimum(Some(0)).build();
        let list = |of: RefOr<Schema>| ArrayBuilder::new().items(of).min_items(Some(1)).build();
        OneOfBuilder::new()
            .item(text())
            .item(list(text().into()))
            .item(list(token().into()))
            .item(list(list(token().into()).into()))
            .into()
    }
}

impl ToSchema for Prompt {}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Prompt, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn each_shape_is_told_by_its_first_element() {
        assert_eq!(read(r#""a""#), Ok(Prompt::Texts(vec!["a".into()])));
        assert_eq!(read(r#"["a", "b"]"#), Ok(Prompt::Texts(vec!["a".into(), "b".into()])));
        assert_eq!(read("[1, 2]"), Ok(Prompt::Tokens(vec![vec![1, 2]])));
        assert_eq!(read("[[1, 2], [3]]"), Ok(Prompt::Tokens(vec![vec![1, 2], vec![3]])));
    }

    #[test]
    fn everything_else_is_refused() {
        for json in
            ["[]", "1", "null", "{}", r#"["a", 1]"#, "[1, [2]]", "[-1]", "[4294967296]", "[[[1]]]", "[1.5]"]
        {
            assert!(read(json).is_err(), "{json}");
        }
    }
}
