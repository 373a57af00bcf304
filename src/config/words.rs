//! Values that TOML writes in two ways: `dp = "auto" | 2`, `warmup = "1 epoch" | "10 steps" | 0.1`, `every = 10 | "2 epochs"`.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use super::eval::Every;
use super::schema::{Dp, Warmup};

impl Serialize for Dp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match *self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Ranks(n) => serializer.serialize_u64(n as u64),
        }
    }
}

impl<'de> Deserialize<'de> for Dp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct DpVisitor;
        impl Visitor<'_> for DpVisitor {
            type Value = Dp;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str(r#""auto" or a number of ranks"#)
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<Dp, E> {
                match word {
                    "auto" => Ok(Dp::Auto),
                    other => Err(E::invalid_value(de::Unexpected::Str(other), &self)),
                }
            }

            fn visit_i64<E: de::Error>(self, n: i64) -> Result<Dp, E> {
                match usize::try_from(n) {
                    Ok(n) if n > 0 => Ok(Dp::Ranks(n)),
                    _ => Err(E::invalid_value(de::Unexpected::Signed(n), &self)),
                }
            }
        }
        deserializer.deserialize_any(DpVisitor)
    }
}

impl JsonSchema for Dp {
    fn schema_name() -> Cow<'static, str> {
        "Dp".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [{ "const": "auto" }, { "type": "integer", "minimum": 1 }] })
    }
}

impl Serialize for Warmup {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match *self {
            Self::Steps(n) => serializer.serialize_str(&format!("{n} steps")),
            Self::Epochs(n) => serializer.serialize_str(&format!("{n} epochs")),
            Self::Fraction(x) => serializer.serialize_f64(x),
        }
    }
}

impl<'de> Deserialize<'de> for Warmup {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct WarmupVisitor;
        impl Visitor<'_> for WarmupVisitor {
            type Value = Warmup;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str(r#""10 steps", "1 epoch" or a fraction in [0, 1) of all steps"#)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Warmup, E> {
                let refuse = || E::invalid_value(de::Unexpected::Str(text), &self);
                let (number, unit) = text.split_once(' ').ok_or_else(refuse)?;
                match unit {
                    "step" | "steps" => number.parse().map(Warmup::Steps).map_err(|_| refuse()),
                    "epoch" | "epochs" => match number.parse() {
                        Ok(epochs) if (0.0..f64::INFINITY).contains(&epochs) => Ok(Warmup::Epochs(epochs)),
                        _ => Err(refuse()),
                    },
                    _ => Err(refuse()),
                }
            }

            fn visit_f64<E: de::Error>(self, x: f64) -> Result<Warmup, E> {
                if (0.0..1.0).contains(&x) {
                    Ok(Warmup::Fraction(x))
                } else {
                    Err(E::invalid_value(de::Unexpected::Float(x), &self))
                }
            }

            fn visit_i64<E: de::Error>(self, n: i64) -> Result<Warmup, E> {
                match n {
                    0 => Ok(Warmup::Fraction(0.0)),
                    _ => Err(E::invalid_value(de::Unexpected::Signed(n), &self)),
                }
            }
        }
        deserializer.deserialize_any(WarmupVisitor)
    }
}

impl JsonSchema for Warmup {
    fn schema_name() -> Cow<'static, str> {
        "Warmup".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [
            { "type": "string", "pattern": "^[0-9.]+ (steps?|epochs?)$" },
            { "type": "number", "minimum": 0, "exclusiveMaximum": 1 }
        ] })
    }
}

impl Serialize for Every {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match *self {
            Self::Steps(n) => serializer.serialize_u64(n as u64),
            Self::Epochs(n) => serializer.serialize_str(&format!("{n} epochs")),
        }
    }
}

impl<'de> Deserialize<'de> for Every {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EveryVisitor;
        impl Visitor<'_> for EveryVisitor {
            type Value = Every;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str(r#"a number of steps, "10 steps" or "2 epochs""#)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Every, E> {
                let refuse = || E::invalid_value(de::Unexpected::Str(text), &self);
                let (number, unit) = text.split_once(' ').ok_or_else(refuse)?;
                let number = number.parse().map_err(|_| refuse())?;
                match unit {
                    "step" | "steps" => Ok(Every::Steps(number)),
                    "epoch" | "epochs" => Ok(Every::Epochs(number)),
                    _ => Err(refuse()),
                }
            }

            fn visit_i64<E: de::Error>(self, n: i64) -> Result<Every, E> {
                usize::try_from(n).map(Every::Steps).map_err(|_| E::invalid_value(de::Unexpected::Signed(n), &self))
            }

            fn visit_u64<E: de::Error>(self, n: u64) -> Result<Every, E> {
                Ok(Every::Steps(n as usize))
            }
        }
        deserializer.deserialize_any(EveryVisitor)
    }
}

impl JsonSchema for Every {
    fn schema_name() -> Cow<'static, str> {
        "Every".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [
            { "type": "integer", "minimum": 0 },
            { "type": "string", "pattern": "^[0-9]+ (steps?|epochs?)$" }
        ] })
    }
}
